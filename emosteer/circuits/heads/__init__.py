"""What the heads of a circuit do: where they look, what they write, which texts they fire on, and how they pass it on (`heads`)."""
