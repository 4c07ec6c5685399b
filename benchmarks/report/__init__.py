"""The page docs/benchmarks.md and its picture, made from results alone.

report   page, main: ``python -m benchmarks report`` writes both
tables   Results, table, TECHNIQUES: result files by name, and figures as Markdown
picture  draw: bars of memory against a T4's
"""
