"""Memory: how good the forecast is, and what loading takes.

forecast     ``python -m benchmarks forecast``: against an allocator, against published figures, as a planner
accuracy     the forecast against torch's own CPU allocator
peer_graphs  what others' scripts run for one step, rebuilt to be counted
loading      ``python -m benchmarks loading``: host memory that loading takes
"""
