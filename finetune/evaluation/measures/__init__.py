"""One measure a file. Each says where its formula comes from, its range, which way is better, and what it needs."""
