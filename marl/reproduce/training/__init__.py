"""Whole runs of `marl`, as a figure asks for them: predator-prey and battles, alone and in sequence."""
