"""A reward server: the rewards of `advflow.rewards` over HTTP, for trainers that have no room for them."""
