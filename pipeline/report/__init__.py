"""Report a run's results: tables in the terminal, a Pareto plot, and an HTML page."""
