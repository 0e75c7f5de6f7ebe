"""How people and batch jobs drive kdpipe: command line, recipes, progress, reports."""
