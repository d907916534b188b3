"""Ways into a finished run from Python and for other programs: Scorer, estimator, metric, ONNX."""
