"""`kdpipe status`: what runs and stores below a folder are at, read without anything heavy."""
