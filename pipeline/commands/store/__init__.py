"""The commands below `kdpipe store`."""
