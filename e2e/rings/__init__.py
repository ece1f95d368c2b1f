"""Rings on a real cluster: what is done to them, what it costs, and the tests of it (`make e2e`).

service    the LLMService that is looked at            ring      one group of it on the cluster
streams    streamed answers, with the moment of each   watching  every change of its pods, in order
drill      a fault in the midst of an answer, and what it cost; bench/ring_recovery makes its figures of these
times      what the tests measured, told at the end of a run
"""
