"""SWS on handwritten digits: one small set of layers, models of three depths."""
