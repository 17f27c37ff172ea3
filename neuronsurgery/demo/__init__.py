"""The demonstration: can a network still learn after many tasks, and what does an operation add to that?

A small network learns one task after another: the same handwritten digits, each time with class labels drawn
anew, uniformly and without regard to the image. Nothing can be carried over from task to task, so a network
that stays plastic does as well on the last task as on the first. `neuronsurgery demo` runs it.

- `digits`: the data and the sequence of tasks
- `networks`: the network, and how its size is counted
- `resets`: the plain reset, for comparison
- `arms`: what is done, or not, to the network within each task
- `run`: one run of one arm
- `schedule`: all runs, on several processes
- `show`: the table, the picture and the sentence that sum them up
"""
