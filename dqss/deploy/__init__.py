"""From a strategy to a file that other runtimes run in integer arithmetic, and the proof that it agrees.

Needs the extra ``onnx`` (``pip install 'dqss[onnx]'``); :mod:`dqss.deploy.targets` needs nothing.
"""
