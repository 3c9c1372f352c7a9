"""The configs that ship with the package; ``snail configs`` lists them."""
