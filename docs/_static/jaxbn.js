// A tap on a figure opens it in full size.
document.addEventListener("DOMContentLoaded", () => {
  for (const image of document.querySelectorAll("article img")) {
    if (image.closest("a") || image.src.endsWith(".svg")) continue;
    const link = document.createElement("a");
    link.href = image.src;
    link.title = "Open the figure";
    image.replaceWith(link);
    link.append(image);
  }
});

// Sentences in a table are not squeezed to a word a line.
document.addEventListener("DOMContentLoaded", () => {
  for (const cell of document.querySelectorAll("article td")) {
    cell.classList.toggle("wordy", cell.textContent.length > 30);
  }
});
