"""What each command of the command line computes and prints."""
