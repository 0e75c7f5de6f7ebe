"""What `kdpipe search` tries: the recipe's section `search`, and the space of settings that it describes."""
