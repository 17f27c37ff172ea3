"""The comparison: every method on tasks that keep changing, each tuned with the same budget.

`neuronsurgery compare-methods` runs it.

- `networks`: the network, how much it stores, and how many multiplications a step takes
- `benchmarks`: four streams of tasks, and a score for each task
- `control`: one of them, a pole to be balanced with senses that change
- `arms`: the methods, with the settings that each is tuned over
- `learning`: a network, its optimizer and what is done to it, step by step
- `running`: one run, and the file that it leaves, so that a comparison goes on where it was stopped
- `planning`: which runs there are: tuning, controls of equal size and compute, and the seeds that count
- `statistics`: means and interquartile means with stratified bootstrap intervals
- `showing`: the table and the figure
"""
