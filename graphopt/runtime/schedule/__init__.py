"""Chunks of a prompt as tasks: a simulator of policies, and what runs their plans."""

from graphopt.runtime.schedule.dag import Dag, Group, Task, chunk_dag, repeated
from graphopt.runtime.schedule.gantt import draw_gantt, save_gantt
from graphopt.runtime.schedule.policies import POLICIES, Processor
from graphopt.runtime.schedule.simulator import Plan, Ran, Timeline, plan, simulate

__all__ = [
    "POLICIES",
    "Dag",
    "Group",
    "Plan",
    "Processor",
    "Ran",
    "Task",
    "Timeline",
    "chunk_dag",
    "draw_gantt",
    "plan",
    "repeated",
    "save_gantt",
    "simulate",
]
