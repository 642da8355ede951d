"""What a model does on rows it has not seen: loss, answers, and conversation."""
