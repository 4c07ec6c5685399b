"""The kinds of data that the front door takes, one to a module. ``dataset`` is the entrance."""
