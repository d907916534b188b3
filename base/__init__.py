"""What every stage needs and no stage owns; standard library only."""
