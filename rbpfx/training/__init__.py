"""Training: the task, the recursion over the noise, the budget, the recovery."""
