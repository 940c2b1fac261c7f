"""Reports for people: a page of one run or of several, and how far two pruned models differ."""
