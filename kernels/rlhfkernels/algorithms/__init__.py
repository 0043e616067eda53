"""Losses, advantages, rewards and selection: plain functions of tensors, one file a family."""
