"""From a CT and a prompt to a mask: zoom-out-zoom-in, sliding windows, the predictor, the viewer and the server."""
