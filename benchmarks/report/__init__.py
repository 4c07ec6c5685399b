"""The page docs/benchmarks.md, the measured part of docs/recipes.md, and pictures, from results alone.

report   page, main: ``python -m benchmarks report`` writes all of them
cards    on_gpus: what each card has shown, and what that does not say
rates    on_rates: what a card multiplies and attends in a second, by shape
smoke    what_holds: short checks on a card
tables   Results, table, TECHNIQUES: result files by name, and figures as Markdown
recipes  renewed, draw: which layers to adapt, into docs/recipes.md and docs/recipes.png
picture  draw: bars of memory against a T4's
"""
