"""What each op group of each chunk waits for."""

from __future__ import annotations

import pytest

from graphopt.runtime.schedule.dag import chunk_dag, repeated
from tests.runtime.schedule.graphs import PAPER, PLAIN


def needs(dag, chunk, position):
    size = max(task.position for task in dag.tasks) + 1
    found = dag.needs[chunk * size + position]
    return {(dag.tasks[n].chunk, dag.tasks[n].position) for n in found}


def test_the_dependencies_of_the_paper():
    """Equations 3 and 4: dynamic G[i,j] <- G[0..i,j-1], static G[i,j] <- G[i,j-1]."""
    dag = chunk_dag(repeated(PAPER, 2), 3, lambda chunk, position: 1.0)
    assert len(dag.tasks) == 3 * 2 * 4
    assert needs(dag, 2, 0) == set()
    assert needs(dag, 2, 1) == {(2, 0)}
    assert needs(dag, 2, 2) == {(0, 1), (1, 1), (2, 1)}
    assert needs(dag, 1, 6) == {(0, 5), (1, 5)}
    assert needs(dag, 2, 7) == {(2, 6)}
    layers = [task.layer for task in dag.tasks[:8]]
    assert layers == [0] * 4 + [1] * 4


@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_a_last_chunk_that_writes_keys_again_waits_for_their_readers(chunks):
    groups = repeated(PLAIN, 2)
    plain = chunk_dag(groups, chunks, lambda i, j: 1.0)
    dag = chunk_dag(groups, chunks, lambda i, j: 1.0, overlap=True)
    last = chunks - 1
    assert needs(dag, last, 0) == {(last - 1, 1)}
    assert needs(dag, last, 3) == {(last, 2), (last - 1, 4)}
    changed = [i for i, n in enumerate(dag.needs) if n != plain.needs[i]]
    assert [dag.tasks[i].chunk for i in changed] == [last, last]


def test_one_chunk_is_a_chain():
    dag = chunk_dag(repeated(PLAIN, 3), 1, lambda i, j: 1.0, overlap=True)
    assert dag.needs == ((), *((i,) for i in range(8)))
    assert dag.unlocks == (*((i,) for i in range(1, 9)), ())


def test_needs_come_before_in_program_order():
    dag = chunk_dag(repeated(PLAIN, 3), 4, lambda i, j: 1.0, overlap=True)
    for task, needed in enumerate(dag.needs):
        assert all(n < task for n in needed)
