"""`kvfold export …`: an artifact as ONNX graphs or as another engine's checkpoint."""
