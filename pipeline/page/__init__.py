"""The page of `kdpipe report`: one HTML file with everything that a run has to show."""
