"""What a scoring costs: foreseen from its passes, timed or rehearsed before it starts, and measured in benchmarks."""
