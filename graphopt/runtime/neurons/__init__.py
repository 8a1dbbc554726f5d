"""The neurons that a cache keeps for `neuron-mask`."""

from graphopt.runtime.neurons.buffers import NeuronBuffers
from graphopt.runtime.neurons.core import CoreNeurons
from graphopt.runtime.neurons.shapes import FfnShape, find_ffn_shapes

__all__ = ["CoreNeurons", "FfnShape", "NeuronBuffers", "find_ffn_shapes"]
