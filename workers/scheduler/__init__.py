"""Who runs in the next step. Pure: a clock, queues and counters in, a StepPlan out; no torch, no I/O."""
