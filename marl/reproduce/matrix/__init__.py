"""Matrix games in sequence: many seeds side by side, with operations at the switches from task to task."""
