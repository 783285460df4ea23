"""The comparison's tables without torch: candidates, measurements, budgets, Pareto, published."""
