"""From a CT and a prompt to a mask: zoom-out-zoom-in, sliding windows, the predictor and the viewer."""
