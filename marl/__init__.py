"""Value factorization for teams of agents: QMIX, QPLEX and VDN on batches of parallel episodes.

Shapes are written with B parallel episodes, N agents, A actions, T steps, O values of an observation and S of the
state; `...` in front stands for nothing, or for seeds that train side by side (`marl.stacking`).
"""
