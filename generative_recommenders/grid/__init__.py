"""Grids: many runs of the launcher, side by side or one after another, and one table of what came out.

`plan` says which runs there are, `sweep` reads the values they vary, `store` remembers them over interruptions,
`schedule` runs them, `display` shows them while they run, `results`, `tables` and `report` compare them, `command` is
the command line.
"""
