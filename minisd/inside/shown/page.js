const steps = JSON.parse(document.getElementById('steps').textContent);
const slider = document.getElementById('step');
function show(i) {
  const step = steps[i];
  document.getElementById('x').src = step.x;
  document.getElementById('estimate').src = step.estimate;
  document.getElementById('numbers').innerHTML = step.numbers;
  document.getElementById('place').textContent = `step ${i + 1} of ${steps.length}`;
  document.querySelectorAll('#table tr').forEach((row, j) => row.classList.toggle('now', j === i + 1));
}
slider.addEventListener('input', () => show(Number(slider.value)));
show(Number(slider.value));
