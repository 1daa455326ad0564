"""What is asked of runs: evaluations, tests, comparisons, robustness, mechanisms, diagnoses; each leaves tables in folders."""
