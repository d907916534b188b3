"""What every stage needs and no stage owns; standard library, with tqdm and torch inside functions."""
