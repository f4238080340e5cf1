"""What papers claim, put to the test: one file a paper, one command, one table.

    python -m benchmarks.claims --budget=short            # every paper's rows, sized to 2.5 hours of two cores a paper
    python -m benchmarks.claims snapgen --budget=night    # one paper, longer
    python -m benchmarks.claims --table                   # the table from what has been measured; nothing is trained

A paper is a module of this package with two values, and two more where it needs them:

    CLAIMS    the rows of its table (`claim.Claim`)
    TRIALS    {name: training} that they need (`trials.Trial`), each after those that it starts from
    MEASURES  {name: measurement} that trains nothing (`trials.Measure`), such as a latency
    METRICS   {key: metric} beside those of `claim.METRICS`

The table is `benchmarks/results/claims/table.md`.
"""
