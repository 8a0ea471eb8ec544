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
