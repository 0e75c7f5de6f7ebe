"""`kdpipe search`: look for the best settings of a student's training from one store."""
