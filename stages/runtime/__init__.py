"""Machine resources that a process shares with others: GPUs, CPU cores, priority, memory."""
