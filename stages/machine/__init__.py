"""How a process takes its place on a machine that others use, too: a GPU, cores, priority, memory."""
