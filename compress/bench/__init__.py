"""`kvfold bench …`: quality beside rivals, and speed on a GPU."""
