"""Services around a running command: signals, event log, run record, options, paths."""
