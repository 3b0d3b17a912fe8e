"""Operations on tensors, each as the torch definition that a faster twin must equal."""
