"""`mage-tune bench`: time per output block, end to end, by the decode engine on this machine.

    floor      what the machine could do at best: its ceilings, measured, and the roofline of each step
    cases      what is timed, most important first
    checks     the engine against the plain decoder; nothing is timed before it passes
    measure    one case
    report     table, JSON, plots
    profiling  where the time of one step goes, kernel by kernel
    run        the command

Arrows: run -> report, profiling, measure, checks -> cases -> floor.
"""
