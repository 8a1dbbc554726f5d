"""A simulator of serving: the engine's schedulers on a device that is only a cost."""

from graphopt.runtime.engine.simulator.cost import Load, StepCost, fit_cost
from graphopt.runtime.engine.simulator.measure import TimedExecutor
from graphopt.runtime.engine.simulator.report import Report
from graphopt.runtime.engine.simulator.simulate import Simulation
from graphopt.runtime.engine.simulator.workload import (
    Arrival,
    fixed_lengths,
    poisson_arrivals,
    zipf_lengths,
)

__all__ = [
    "Arrival",
    "Load",
    "Report",
    "Simulation",
    "StepCost",
    "TimedExecutor",
    "fit_cost",
    "fixed_lengths",
    "poisson_arrivals",
    "zipf_lengths",
]
