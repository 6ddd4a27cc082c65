"""Hostile and damaged input of every kind that kvfold reads, made by a seeded mutator: an artifact,
a saved cache, a GGUF, the work folder of an interrupted run.

Whatever it makes is refused in one sentence (KvfoldError) or gives what it gave before: never
another error, never a hang, never more memory than the whole input takes. `make fuzz` runs 20,000
cases, tests/fuzz/test_fuzz.py some hundred. Case n of a seed is a function of both alone: `make
fuzz ARGS="--seed S --only N"` repeats one.
"""
