"""Views of the part of the tensors that a rank holds, and what ranks agree on and sum."""
